from diffusion_lit.codecs.first_stage import FirstStage

__all__ = ["FirstStage"]
