"""The bundled environments. Import them as `rlkit.envs`, a symbolic link to this folder, never as `envs`."""
