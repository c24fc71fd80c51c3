"""Diffusers is to open what lies on the disk and ask nobody."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
