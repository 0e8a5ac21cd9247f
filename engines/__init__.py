"""The bundle, and the engines that run one graph of it."""
