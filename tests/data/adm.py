import numpy as np
from PIL import Image


def adm_center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """Retyped from guided_diffusion/image_datasets.py, `center_crop_arr`."""
    while min(*image.size) >= 2 * image_size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)  # type: ignore[arg-type]
    scale = image_size / min(*image.size)
    image = image.resize(
        tuple(round(x * scale) for x in image.size),  # type: ignore[arg-type]
        resample=Image.Resampling.BICUBIC,
    )
    array = np.array(image)
    crop_y = (array.shape[0] - image_size) // 2
    crop_x = (array.shape[1] - image_size) // 2
    return array[crop_y : crop_y + image_size, crop_x : crop_x + image_size]
