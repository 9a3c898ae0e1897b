"""Are the gradients of a model's operations those of what they compute?

One process runs one small batch through the whole model and its loss in fp64, with weights off their initial values,
and keeps what every operation with a backward of its own (a `torch.autograd.Function`, of ours or of a user's) and
every module was called with. Each call is then made again alone, and its gradients, of every floating input and of
every weight, are held against central finite differences of the same forward, and against torch's autograd where that
can differentiate the forward. What is inside of a call comes before it, so the innermost wrong one is named; the whole
model comes last.

`megapar verify` begins with this: the one-process run that layouts are compared with runs the same operations.
"""

from megapar.operations.check import BOUND, Report, Wrong, check_operations

__all__ = ["BOUND", "Report", "Wrong", "check_operations"]
