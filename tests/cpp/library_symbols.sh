# usage: library_symbols.sh NM LIBRARY
# Of torch the operator library uses the stable C functions and nothing else, so that it loads on
# every torch since the one it was built with; the rest is the C and C++ runtime.
symbols=$("$1" -D --undefined-only "$2") || exit 2
found=$(printf '%s\n' "$symbols" | awk '{print $NF}' | grep -v -E \
  -e '@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$' -e '^(aoti_torch|torch)_[A-Za-z0-9_]+$' \
  -e '^(__cxa_finalize|__gmon_start__|_ITM_(de)?registerTMCloneTable)$')
[ -z "$found" ] && exit 0
printf '%s\n' "$found" | sed 's/^/needed: /'
exit 1
