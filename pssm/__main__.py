"""`python -m pssm` is the command `pssm`."""

import sys

from pssm.cli import main

sys.exit(main())
