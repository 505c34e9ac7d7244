"""Tests compare with truths in float64.

A test that turns warnings into errors names their class: torch imports parts of itself on first use
and may warn of what it deprecates then, so that "error" alone depends on which test ran before.
"""

import torch

torch.set_default_dtype(torch.float64)
