"""copg-kernels in other people's models and trainers; each module here needs the package it is named after."""
