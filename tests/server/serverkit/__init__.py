"""What the tests of server and client share: tiny models on disk, a scripted core, servers in their own processes."""

SCRIPTED_CORE = "serverkit.fake_core:ScriptedCore"
