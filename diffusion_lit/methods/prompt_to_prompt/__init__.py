"""Prompt-to-Prompt: images are edited by editing their texts, through the attention of the network.

    predict --ckpt_path MODEL --prompts "a three" --edit PromptToPrompt --edit.replace three:seven
    predict --ckpt_path MODEL --prompts "a three" --edit AttentionMaps

Source: Hertz et al. 2022, "Prompt-to-Prompt image editing with cross attention control".
"""

from diffusion_lit.methods.prompt_to_prompt.attention_maps import AttentionMaps
from diffusion_lit.methods.prompt_to_prompt.edit import PromptToPrompt

__all__ = ["AttentionMaps", "PromptToPrompt"]
