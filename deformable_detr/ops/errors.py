"""What is raised where a backend cannot run. Chapter 7 compares the backends."""


class BackendError(RuntimeError):
    """A backend that was asked for, or found, cannot run."""
