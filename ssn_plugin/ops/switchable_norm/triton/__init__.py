"""The Triton backend; the only folder that imports Triton."""
