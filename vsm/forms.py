"""Compare the form of loaded data (checkpoints, flags, arrays) with the form that is expected."""

import torch


def mismatch(value, like, name=""):
    """The first difference in form between `value` and `like`, in a few words with its place, or None if there is none.

    `like` is a type or an example. For a type, `value` must be an instance. For a dict it must have the same keys and for a list
    the same length, and the items are compared in turn. For a tensor it must have the same shape and kind of number. For
    anything else it must have the same type; an int passes for a float.
    """
    at = name or "it"
    if isinstance(like, type):
        return None if isinstance(value, like) and not (like in (int, float) and isinstance(value, bool)) else \
            f"{at} is {describe(value)}, not of type {like.__name__}"
    if isinstance(like, dict):
        if not isinstance(value, dict):
            return f"{at} is {describe(value)}, not a dict"
        for key in (*like, *value):
            if key not in value:
                return f"{at} lacks {key!r}"
            if key not in like:
                return f"{at} has {key!r}, which is unknown"
        pairs = ((value[key], like[key], f"{name}.{key}".lstrip(".")) for key in like)
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            return f"{at} is {describe(value)}, not a list of {len(like)}"
        pairs = ((one, other, f"{name}[{i}]") for i, (one, other) in enumerate(zip(value, like)))
    elif isinstance(like, torch.Tensor):
        same = isinstance(value, torch.Tensor) and value.shape == like.shape \
            and value.is_floating_point() == like.is_floating_point()
        return None if same else f"{at} is {describe(value)}, not a {describe(like)}"
    else:
        numbers = type(like) is float and type(value) is int
        return None if type(value) is type(like) or numbers else f"{at} is {describe(value)}, not of type {type(like).__name__}"
    return next((difference for pair in pairs if (difference := mismatch(*pair))), None)


def describe(value):
    """A value in a few words, for a message."""
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:40]
