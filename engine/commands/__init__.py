"""The commands. Each imports what it needs when it runs, so that help and checks start at once."""
