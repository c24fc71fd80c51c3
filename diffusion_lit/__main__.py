"""`python -m diffusion_lit`."""

from diffusion_lit.cli import main

if __name__ == "__main__":
    main()
