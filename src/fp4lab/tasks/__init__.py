"""What a run does: one file a task, over one session, reporting through `emit`."""
