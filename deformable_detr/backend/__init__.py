"""Implementations of the operator; `deformable_detr.ops` picks one."""


class BackendError(RuntimeError):
    """A backend that was asked for, or found, cannot run."""
