"""`python -m diffusion_lit`."""

from diffusion_lit.main import main

if __name__ == "__main__":
    main()
