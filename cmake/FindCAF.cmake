# Debian's libcaf-dev ships neither a CMake package nor a pkg-config file.
# Defines CAF::core, CAF::io and CAF::openssl.
find_path(CAF_INCLUDE_DIR caf/all.hpp)
set(_caf_required CAF_INCLUDE_DIR)
foreach(_part core io openssl)
  find_library(CAF_${_part}_LIBRARY caf_${_part})
  list(APPEND _caf_required CAF_${_part}_LIBRARY)
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CAF REQUIRED_VARS ${_caf_required})

if(CAF_FOUND AND NOT TARGET CAF::core)
  find_package(Threads REQUIRED)
  foreach(_part core io openssl)
    add_library(CAF::${_part} UNKNOWN IMPORTED)
    set_target_properties(CAF::${_part} PROPERTIES
      IMPORTED_LOCATION ${CAF_${_part}_LIBRARY}
      INTERFACE_INCLUDE_DIRECTORIES ${CAF_INCLUDE_DIR})
  endforeach()
  target_link_libraries(CAF::core INTERFACE Threads::Threads)
  target_link_libraries(CAF::io INTERFACE CAF::core)
  target_link_libraries(CAF::openssl INTERFACE CAF::io)
endif()
