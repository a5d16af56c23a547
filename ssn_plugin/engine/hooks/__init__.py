"""The hooks that mmengine finds by name."""
