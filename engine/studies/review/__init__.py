"""Reviews of a run by people: which images are shown, the page that shows them, and what becomes of the answers."""
