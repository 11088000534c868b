"""The verifiers' process, as pool.py starts it."""

from megatron_fipo.rewards.server import main

if __name__ == "__main__":
    main()
