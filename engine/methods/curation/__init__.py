"""Self-consuming loops with curated data: selection, rewards, generators, attacks, defences. Pure computation.

Sources: Ferbach, Bertrand, Bose and Gidel 2024 (arXiv 2407.09499) for curation; Wei and Zhang 2025 (arXiv 2505.09768)
for adversarial curation, with their public code (github.com/osu-srml/Adversarial-Curation).

Shapes: `...` independent runs (seeds) that are computed together, N records or samples, K candidates of a choice, M
points of a support, d features, P parameters of a reward model. Rewards are natural logarithms of choice weights
(nats).
"""
