"""Time derivatives of networks by forward mode, the rules they need, and the state of torch.func;
README.md says when each may go.
"""
