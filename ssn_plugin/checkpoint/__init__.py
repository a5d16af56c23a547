"""Checkpoint files: read them safely, tell what they are, convert, publish. Needs torch alone."""
