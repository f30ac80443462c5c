"""What archives tell when they are laid side by side."""
