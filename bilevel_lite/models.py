"""The models that the tasks need, as plain modules."""

from torch import nn


def linear(inputs: int, classes: int, bias: bool = True) -> nn.Module:
    """Softmax regression: logits = W x + c, with d = (inputs + bias) * classes parameters."""
    return nn.Linear(inputs, classes, bias=bias)


def mlp(inputs: int, classes: int, hidden: int = 256) -> nn.Module:
    """One hidden layer of ``hidden`` tanh units.

    tanh rather than ReLU, so that the inner loss has a Hessian everywhere.
    """
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


MODELS = {"linear": linear, "mlp": mlp}


def build(name: str, inputs: int, classes: int) -> nn.Module:
    """Build a model by its command-line name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {sorted(MODELS)}")
    return MODELS[name](inputs, classes)
