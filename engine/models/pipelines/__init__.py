"""Families of diffusion pipelines behind one interface (`base.Pipeline`); `registry` names the class of each."""
