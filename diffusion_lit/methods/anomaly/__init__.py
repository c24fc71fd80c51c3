"""Anomaly detection by partial diffusion (AnoDDPM): good images are learned, and what is not like them is marked.

    fit -c anoddpm --data.source.root data/parts
    test --ckpt_path runs/anoddpm/checkpoints/last.ckpt
    predict --ckpt_path runs/anoddpm/checkpoints/last.ckpt

Source: Wyatt et al. 2022, "AnoDDPM: Anomaly detection with denoising diffusion probabilistic models using simplex
noise".
"""
