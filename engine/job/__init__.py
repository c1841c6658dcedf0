"""What is asked for and what is recorded of it: job file, plan, quotas, acceptance, records. Pure Python."""
