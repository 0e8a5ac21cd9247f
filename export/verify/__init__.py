"""The numeric checks that every graph passes before a bundle exists."""
