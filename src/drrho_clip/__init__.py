"""DRRho-CLIP (arXiv:2505.06699) on FastCLIP (arXiv:2407.01445): the method, without flags, training loop or files.

These names of sizes are used everywhere: ``b`` samples on this rank, ``K`` ranks, ``B = K * b`` samples in
the global batch, ``N`` samples in the data set, ``d`` and ``d_r`` the embedding widths of target and reference.
"""
