"""Stands in for the archives that Bazel 4 fetches for any cc_* rule or test: its native rules do."""

def _files_impl(ctx):
    for path, text in ctx.attr.files.items():
        ctx.file(path, text)

_files = repository_rule(_files_impl, attrs = {"files": attr.string_dict()})

def _native_rules(name, package, rules):
    _files(name = name, files = {
        "BUILD.bazel": "",
        package + "/BUILD.bazel": "",
        package + "/defs.bzl": "".join(["%s = native.%s\n" % (rule, rule) for rule in rules]),
    })

def offline_repositories():
    # Debian's build tells no version at all.
    if native.bazel_version and int(native.bazel_version.split(".")[0]) > 4:
        return
    _native_rules(
        "rules_cc",
        "cc",
        ["cc_binary", "cc_import", "cc_library", "cc_test", "cc_toolchain", "cc_toolchain_suite"],
    )
    _native_rules(
        "rules_java",
        "java",
        ["java_binary", "java_import", "java_library", "java_runtime", "java_toolchain"],
    )
    _files(name = "remote_coverage_tools", files = {
        "none.sh": "exit 1\n",
        "BUILD.bazel": "".join([
            "sh_binary(name = '%s', srcs = ['none.sh'], visibility = ['//visibility:public'])\n" % tool
            for tool in ["coverage_report_generator", "lcov_merger"]
        ]),
    })
