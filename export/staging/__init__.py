"""A destination that is whole or absent, after any crash, and that replaces nothing but an old bundle."""
