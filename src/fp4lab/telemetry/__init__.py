"""Memory, as read from outside a process and from inside it. Unknown is None, never 0."""
