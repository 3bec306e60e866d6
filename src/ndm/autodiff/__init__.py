"""Time derivatives of networks by forward mode, with the rules they need; see README.md."""
