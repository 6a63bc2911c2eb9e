"""What is raised where a backend cannot run."""


class BackendError(RuntimeError):
    """A backend that was asked for, or found, cannot run."""
