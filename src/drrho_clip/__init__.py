"""DRRho-CLIP (arXiv:2505.06699) on FastCLIP (arXiv:2407.01445): the method, free of flags, loops and files.

Shapes are named once and used everywhere: ``b`` samples on this rank, ``K`` ranks, ``B = K * b`` samples in
the global batch, ``N`` samples in the data set, ``d`` and ``d_r`` the embedding widths of target and reference.
"""
