"""Engines that bound the margins of a network, and its neurons, over Wasserstein balls."""
