"""From many workers to one finished run: scheduler, run loop, executors, progress."""
