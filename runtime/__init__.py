"""What a run needs besides its network, data and loss."""
