"""What people do with a likelihood."""
