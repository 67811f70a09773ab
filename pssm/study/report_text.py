"""The fixed texts of the report: markers, the words that verdicts start with, the glossary, and the styles."""

SIGNS = {"good": "●", "check": "▲", "bad": "■", "none": "○"}
WORDS = {"good": "good", "check": "check", "bad": "not reliable"}
VERDICTS = {
    "bad": r"(do not|don't|not |never|unreliable|biased|wrong|failed|too (narrow|wide)|reject)",
    "check": r"(check|caution|careful|warning|use with|usable|close|approximate|almost|nearly|wide|narrow)",
    "good": r"(trust|good|ok\b|reliable|agrees|exact|reference|the reference|matches|safe|converged)",
}

GLOSSARY = {
    "R-hat": "Compares Markov chains with each other. Up to 1.01 they agree; above, they have not mixed: run longer.",
    "ESS": "Effective sample size: how many independent draws the chain is worth. Want 400 or more everywhere.",
    "Divergences": "Steps where NUTS lost its way. Any at all can mean that a part of the posterior was missed.",
    "ELBO": "A lower bound on the log evidence, in nats. Higher is tighter; compare only fits of one model and data.",
    "Log evidence": "Log probability of the data under the model. The table says how it was found.",
    "k-hat": "How heavy the tails of the importance weights of an approximation are. Below 0.5 good, "
    "up to 0.7 repairable by the weights, above 0.7 not reliable.",
    "elpd": "Expected log predictive density of data not yet seen; here each step is forecast from the past only. "
    "Higher is better; a difference below about 4 says little.",
    "Coverage": "How often the 90 % interval held the value that came. Far below: overconfident; far above: too wide.",
    "Error in sds, sd ratio": "Distance of a posterior mean from the reference in its sds (0 is perfect), and the sd "
    "over the reference's sd (1 is perfect; below 1 is overconfident).",
}

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2126; --soft: #5b636e; --line: #dfe3e8; --card: #f6f7f9;
  --good: #006d4e; --check: #8a5a00; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --line: #363c44;
  --card: #1e2227; --good: #4cc9a0; --check: #f0b84a; --bad: #ff8c5a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: 0; }
.small, figcaption, .none { color: var(--soft); font-size: .88rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; font-weight: 600; }
.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem; }
.verdicts li { display: grid; grid-template-columns: 8.5rem 1fr; gap: .8rem; padding: .7rem .9rem;
  background: var(--card); border-left: 5px solid var(--line); border-radius: 4px; }
.verdicts .note { margin-top: .25rem; white-space: pre-line; }
.light { font-weight: 700; white-space: nowrap; }
li.good { border-color: var(--good); } li.check { border-color: var(--check); } li.bad { border-color: var(--bad); }
li.good .light, .sign.good { color: var(--good); } li.bad .light, .sign.bad { color: var(--bad); }
li.check .light, .check > strong, strong.check, .sign.check { color: var(--check); } .sign.none { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; } tbody th { font-weight: 600; }
.num { text-align: right; white-space: nowrap; } tr.new > * { border-top: 2px solid var(--line); }
table + p, .scroll + p { margin-top: .5rem; }
figure { margin: 0 0 1.8rem; break-inside: avoid; }
img { display: block; width: 100%; max-width: 900px; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .4rem; max-width: 46rem; }
.words { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 0; font-size: .93rem; }
.words dt { font-weight: 600; max-width: 12rem; } .words dd { margin: 0; min-width: 0; }
.code dd { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 600px) { .verdicts li, .words { grid-template-columns: 1fr; gap: .2rem; } }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --card: #fff; --good: #006d4e;
  --check: #8a5a00; --bad: #b03a00; } body { font-size: 10.5pt; } main { padding: 0; max-width: none; }
  .scroll { overflow: visible; } table { font-size: 8pt; } tr, .verdicts li { break-inside: avoid; }
  h2 { break-after: avoid; } .verdicts li { border: 1px solid var(--line); border-left-width: 5px; } }
"""
