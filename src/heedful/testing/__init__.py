"""The contract suite, for the strategies of this package and for anyone's own.

    TestMine = heedful.testing.contract(MyStrategy)     # a pytest test class
    heedful.testing.verify(MyStrategy).ok               # without pytest

``drawn_samples`` gives Hypothesis problems to draw. Neither pytest nor Hypothesis is imported before it is used.
"""

from heedful.testing.contract import Check, Report, Result, checks, contract, examined, parameters, report, verify
from heedful.testing.draw import drawn_samples
from heedful.testing.samples import Sample
from heedful.testing.subject import Outcome
from heedful.testing.table import EXHAUSTIVE, SAMPLES
from heedful.testing.tolerance import ContractBroken, Deviation, Tolerance

__all__ = [
    "EXHAUSTIVE",
    "SAMPLES",
    "Check",
    "ContractBroken",
    "Deviation",
    "Outcome",
    "Report",
    "Result",
    "Sample",
    "Tolerance",
    "checks",
    "contract",
    "drawn_samples",
    "examined",
    "parameters",
    "report",
    "verify",
]
