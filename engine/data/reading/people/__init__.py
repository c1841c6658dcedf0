"""What people's answers say of a run: how many labels hold, how far raters agree, what oracles and rules are worth."""
