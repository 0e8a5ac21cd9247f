"""The HIVTP rule: the spec, its numpy definition, and the forms that are tested against it."""
