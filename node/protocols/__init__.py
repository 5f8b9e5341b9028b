"""Protocol and framing specifications shipped with tickmesh, one TOML file each."""
