"""The self-consuming loop: generate, curate, fine-tune the generator on what was selected, and again."""
