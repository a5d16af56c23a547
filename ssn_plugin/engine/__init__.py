"""What mmengine needs: registration, hooks and the optimizer wrapper constructor."""
