"""The commands of the export."""
