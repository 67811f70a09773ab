"""Neural networks (Equinox) for amortised inference and learned dynamics; `register` makes them NumPyro parameters."""

from pssm.nets.combiner import Combiner, RecurrentFeatures
from pssm.nets.decoders import FrameDecoder, LinearDecoder, MLPDecoder
from pssm.nets.encoders import (
    BackwardEncoder,
    LocalEncoder,
    SequenceEncoder,
    SmoothingEncoder,
    sequence_encoder,
)
from pssm.nets.features import AdditiveFeatures, StepMLP, StridedCNN
from pssm.nets.frames import FrameEncoder, HistoryWeights
from pssm.nets.masking import coordinated_dropout, hide_end, hide_entries, hide_steps
from pssm.nets.mixers import GRU, LSTM, SelfAttention
from pssm.nets.potentials import PotentialHead, PseudoObservation
from pssm.nets.s5 import S5
from pssm.nets.transitions import (
    GatedTransition,
    GraphTransition,
    GRUTransition,
    LocallyLinearTransition,
    MechanicalTransition,
    ResidualTransition,
    Saturated,
)
from pssm.register import is_trainable, register

__all__ = [
    "GRU",
    "LSTM",
    "S5",
    "AdditiveFeatures",
    "BackwardEncoder",
    "Combiner",
    "FrameDecoder",
    "FrameEncoder",
    "GRUTransition",
    "GatedTransition",
    "GraphTransition",
    "HistoryWeights",
    "LinearDecoder",
    "LocalEncoder",
    "LocallyLinearTransition",
    "MLPDecoder",
    "MechanicalTransition",
    "PotentialHead",
    "PseudoObservation",
    "RecurrentFeatures",
    "ResidualTransition",
    "Saturated",
    "SelfAttention",
    "SequenceEncoder",
    "SmoothingEncoder",
    "StepMLP",
    "StridedCNN",
    "coordinated_dropout",
    "hide_end",
    "hide_entries",
    "hide_steps",
    "is_trainable",
    "register",
    "sequence_encoder",
]
