"""Models derived from trained ones: a feed-forward layer becomes experts, experts become fewer."""
