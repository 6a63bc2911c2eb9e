"""What is raised where a backend cannot run. Chapter making_it_fast compares the backends."""


class BackendError(RuntimeError):
    """A backend that was asked for, or found, cannot run."""
