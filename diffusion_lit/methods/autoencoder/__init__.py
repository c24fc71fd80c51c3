"""First stages of latent diffusion: autoencoders with a perceptual and an adversarial loss.

    fit -c kl_f8 --data.source.root data/openimages/train --data.source.val_root data/openimages/val
    test --ckpt_path runs/kl_f8/checkpoints/last.ckpt
    predict --ckpt_path runs/kl_f8/checkpoints/last.ckpt

`test` and `predict` reconstruct images of the data. Source: Rombach et al. 2022, "High-resolution image synthesis with
latent diffusion models", section 3.1; Esser et al. 2021, "Taming transformers for high-resolution image synthesis".
"""
